"""From a request's prompt to the routes that its layers attend under."""
