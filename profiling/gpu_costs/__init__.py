"""The model of gpu_model.py: what the CUDA path asks of a GPU, and what a GPU might take for it."""
