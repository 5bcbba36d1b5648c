def pytest_make_parametrize_id(val: object) -> str | None:
    """Bytes are not part of a test's name: a compressed file holds the second in which it was made.

    pytest numbers equal names. Processes that name a test differently refuse to share the tests.
    """
    return "bytes" if isinstance(val, bytes) else None
