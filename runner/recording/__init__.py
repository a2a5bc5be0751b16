"""Record every DeepGEMM call of a server, on its GPU or on a stand-in."""
