"""What runs inside of the process that the sandbox starts; standard library only, and little of it."""
