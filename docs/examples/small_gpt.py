"""A small language model on real text: one step by its curvature beside one along the gradient.

pip install "gpu-hodlr[torch]" is all it needs; the text is Python's own documentation.
"""

import pydoc_data.topics

import torch
from torch import nn

import gpu_hodlr as gh

LENGTH, WIDTH, HEADS = 16, 16, 2
DAMPING = 0.1

text = pydoc_data.topics.topics["typesseq"].lower()
characters = sorted(set(text))
codes = torch.tensor([characters.index(c) for c in text])


class GPT(nn.Module):
    """One causal block; the head is the embedding."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.places = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the next character at every place."""
        h = self.embedding(tokens) + self.places
        q, k, v = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](h)).chunk(3, dim=2)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        h = h + self.mlp(self.norms[1](h))
        return self.head(self.norms[2](h))  # (sequences, places, characters)


def sequences(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces of the text, and the same one character on."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(len(codes) - LENGTH, (number, 1), generator=generator)
    places = start + torch.arange(LENGTH)
    return codes[places], codes[places + 1]


def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


torch.manual_seed(0)
model = GPT(len(characters))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for step in range(100):
    optimizer.zero_grad()
    loss_of(*sequences(32, step)).backward()
    optimizer.step()

# The Gauss-Newton matrix at 128 sequences, by products alone: the outputs are 130,000. Targets of
# shape (sequences, places) say that the classes come last.
inputs, targets = sequences(128, 1000)
op = gh.GGNOperator(model, "cross_entropy", inputs, targets)
print(op)
K = gh.compress(op, "lowrank", rtol=1e-2, max_rank=400)
print(K)

model.zero_grad()
before = loss_of(inputs, targets)
before.backward()
gradient = torch.nn.utils.parameters_to_vector([p.grad for p in model.parameters()])
F = K.factorize(damping=DAMPING)
newton = -F.solve(gradient)
exact, info = gh.cg(op, -gradient, damping=DAMPING, M=F, rtol=1e-3)
print(f"CG on the exact matrix: {info.iterations} iterations with the factor")

# Both steps as far as they help most.
weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
found = {}
for name, direction in (("gradient", -gradient), ("Gauss-Newton", newton)):
    losses = []
    for scale in 2.0 ** torch.arange(-8, 5):
        torch.nn.utils.vector_to_parameters(weights + scale * direction, model.parameters())
        with torch.no_grad():
            losses.append(loss_of(inputs, targets).item())
    found[name] = min(losses)
    print(f"a step along the {name}: loss {before.item():.3f} to {found[name]:.3f}")

assert K.report.error <= 3e-2
assert found["Gauss-Newton"] < found["gradient"]
assert info.converged
