"""See every DeepGEMM compile of any command."""
