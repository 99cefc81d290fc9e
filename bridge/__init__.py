"""How weights change shape and place: layouts, rules, plans, checkpoints, transports."""
