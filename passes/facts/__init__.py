"""What every step may ask of a graph: its nodes, operators, collectives, groups, checkpoints. Changes nothing."""
