"""Speed and memory of burnish beside its peers: `python -m benchmarks --help`, results in RESULTS.md."""
