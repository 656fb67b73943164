"""Relative-position attention: `op` is the public function, `reference` its definition."""
