"""Tuning of bptt, batch size and mem_len by measurement."""
