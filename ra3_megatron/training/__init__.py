"""One training engine: micro-batches through Megatron's schedule, loss components, optimizer."""

import ra3_megatron.parallel  # noqa: F401  must come before the first import of Megatron-Core
