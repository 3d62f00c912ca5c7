"""Exported programs (torch.export) in and out, around the one patcher."""
