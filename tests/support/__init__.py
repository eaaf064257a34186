"""What the tests share: programs run as a user does, small runs, oracles, worlds where the truth is known."""
