"""What is being done, in words, for who waits for it: the command line says them where a command is silent for long."""

import logging

logger = logging.getLogger("east_plugins.doing")


def doing(what: str) -> None:
    """Say that `what`, such as `reading cifar10`, begins. By itself nobody hears it: it is logged as INFO, step by step
    more than a log should have, by a logger of its own."""
    logger.info(what)
