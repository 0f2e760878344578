"""What tests are made with and no test is: ranks, runs, tiny models, and stand-ins for what needs a GPU."""
