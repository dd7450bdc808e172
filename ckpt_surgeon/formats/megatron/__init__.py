"""Megatron-LM's classic folders: a folder for each rank of tensor and pipeline parallelism."""
