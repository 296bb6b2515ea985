"""What methods do beside dropping and growing weights: host plugins by name."""
