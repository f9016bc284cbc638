"""What the tests share: servers, databases, brokers, an app, worker processes, waiting."""
