"""DeepSpeed's folders: ZeRO, in which each process has a part of the weights, and universal checkpoints."""
