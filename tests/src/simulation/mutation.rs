//! Faults that must not go unnoticed: to see that the checks can fail.

use std::str::FromStr;

/// What is broken on purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mutation {
    /// Nothing.
    #[default]
    None,
    /// The backend appends whatever the author knows: there is no fence.
    Fence,
    /// The log never tells its last sequence: a follower's probe finds nothing.
    Probe,
}

impl FromStr for Mutation {
    type Err = String;

    fn from_str(name: &str) -> Result<Mutation, String> {
        match name {
            "fence" => Ok(Mutation::Fence),
            "probe" => Ok(Mutation::Probe),
            _ => Err(format!("{name:?} is neither fence nor probe")),
        }
    }
}
