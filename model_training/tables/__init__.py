"""Result folders to tables and figures."""
