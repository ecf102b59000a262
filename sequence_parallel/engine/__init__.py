"""Fast versions of lecture 06: gathers again in backward, messages during computation, deferred weight gradients."""
