"""The simulator replays a Schedule in virtual time with cost models, without torch."""
