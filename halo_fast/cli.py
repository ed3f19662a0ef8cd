"""The command line: `halo VERB [CONFIG.yaml] [--section.setting value]`."""


def main() -> int:
    """Run the command line."""
    return 0
