"""The hospital's agent, called site in the words of the product."""
