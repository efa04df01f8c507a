"""Re-parameterization, export, quantization for runtimes, benchmarks and serving."""
