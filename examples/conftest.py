"""What pytest leaves out when it looks for examples in docstrings."""

collect_ignore = ["adapter_decay.py"]  # its imports are of the extra `field`, and it has no such examples
