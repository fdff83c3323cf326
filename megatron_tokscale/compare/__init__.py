"""Two runs token by token: gained and lost tokens, shifts of learning times; and forecasts."""
