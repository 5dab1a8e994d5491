"""Names of upstream operators that programs import."""
