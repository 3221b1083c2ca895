"""How many warm-up steps the chunked recurrence may take."""

WARMUP_NOTCHES = (32, 64, 96, 128, 192, 256, 384)
