"""What things cost, and real data as problems for `mtl-compare`."""
