"""What is measured of a model: each file one protocol, each knowing nothing but `predict`."""
