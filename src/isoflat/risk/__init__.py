"""The loss as a sum over data: batches, losses, the one loop, and its second derivatives."""
