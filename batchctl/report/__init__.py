"""What people and programs ask about jobs."""
