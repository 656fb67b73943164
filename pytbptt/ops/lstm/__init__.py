"""The recurrence of an LSTM layer: `op` is the public function, `reference` its definition."""
