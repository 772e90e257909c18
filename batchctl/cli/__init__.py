"""What a person or a crontab types."""
