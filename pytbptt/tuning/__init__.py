"""Which bptt, batch size and memory length: measured on the user's own model, data and machine."""
