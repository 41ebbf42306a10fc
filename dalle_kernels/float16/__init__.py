"""The 16-bit formats 1-6-9 and 0-6-10 (paper B.2 and E.2): encoders and decoders."""
