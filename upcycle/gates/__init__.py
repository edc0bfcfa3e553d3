"""How tokens choose experts: how routers start, how they stay balanced."""
