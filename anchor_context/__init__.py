"""AnchorAttention for long-context training (arXiv 2411.13476). Start reading at `train.py`."""
