"""What benchmarks share: a mesh of real services, loads in processes of their own, reports."""
