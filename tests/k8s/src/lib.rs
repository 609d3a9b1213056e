//! The suite lives in `tests/`; this library is empty.
//! A package needs a target that an ordinary build compiles.
