"""AdamW with moments in 16-bit formats (paper B.2)."""
