"""--job=benchmark: which of the benchmarks is run."""

from dppa_jax.config.benchmark import BenchmarkConfig


def run_benchmark(config: BenchmarkConfig) -> dict:
    """Run the benchmark that the config asks for, and return what it measured."""
    if config.restart:
        from dppa_jax.benchmark.restart import run_restart_benchmark as run
    elif config.scaling:
        from dppa_jax.benchmark.scaling import run_scaling as run
    elif config.device:
        from dppa_jax.benchmark.device import run_device_benchmark as run
    else:
        from dppa_jax.benchmark.merges import run_merges as run
    return run(config)
