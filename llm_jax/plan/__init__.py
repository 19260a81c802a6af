"""What is known of a run before it starts: shapes, memory, communication, time."""
