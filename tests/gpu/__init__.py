"""What needs a GPU: `make gpu-check`. The test process itself never touches CUDA, so that it may fork ranks."""
