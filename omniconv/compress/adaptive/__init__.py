"""Networks whose cost follows the input or the budget of the moment."""
