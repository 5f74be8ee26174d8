"""The streams of random numbers: each use of a seed has its own, so that none repeats another's.

A stream is named by what is added to the user's seed: `rng((seed, SKETCH))`. Where a seed stands
alone it is the user's for that one purpose: samples, Gram vectors, the start of Lanczos.
"""

SKETCH = 0xA5  # Omega of Y = K Omega, also of the HSS form made of an FMM form
PROBE = 0x9E37  # the vectors, or rows, that the error is measured with
CONSISTENCY = 0xC0  # entries and vectors looked at before the work
PREDICTION = 0xA0  # blocks that "auto" looks at
ENTRY_COLUMNS = 0xE7  # columns sampled outside a node
SIBLING_COLUMNS = 0x51B  # columns sampled of a node's sibling
PRODUCTS_ONLY = 0x9AD  # places where a form from products alone is checked
HODLR_COLUMNS = 0x40D  # random columns of HODLR's peeling
TRACE = 0x7C  # signs that traces of a gradient are estimated with
NEIGHBOURS = 0x4E  # directions of the trees that neighbours are searched in
ENERGIES = 0xE2  # rows of a network's matrix in its eigenbasis
LOGARITHM = 0x10E  # signs for the trace of a logarithm
DIAGONAL = 0xD1A  # signs that the diagonal of an inverse is estimated with
VERIFY = 0x0DD  # the right-hand side that a solver is tried with
SPECTRAL = 0x2E  # vectors, or columns, that the spectral error is measured with
TARGETS = 0x7A6  # targets drawn from a network's likelihood
ADJOINT = 0xAD1  # vectors that derivatives of a network are tried with
ORDERING = 0x07D  # random columns that an indefinite matrix's own are told apart by
DENSITY = 0x5DE  # vectors that the density of a spectrum is estimated by
SUBSET = 0x5B5  # points that hyper-parameters are first fitted on
RESTARTS = 0x4E5  # where optimizations of them begin
OBSERVATIONS = 0x0B5  # noise of a posterior's samples
CURVATURE = 0x6A5  # rows of a root that a preconditioner is made of, step by step
