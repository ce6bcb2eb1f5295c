//! What a query string asks of something stored.

use crate::error::{ApiError, ErrorCode};
use axum::extract::Query;
use axum::http::Uri;
use std::collections::BTreeMap;

/// What is wanted of a stored answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Its events rather than the answer.
    pub(crate) stream: bool,
    /// Only those after this one.
    pub(crate) starting_after: Option<String>,
}

impl Wanted {
    /// Fields that nobody knows are skipped, as OpenAI's clients send some.
    pub(crate) fn read(query: Option<&str>) -> Result<Wanted, ApiError> {
        let uri = Uri::builder().path_and_query(format!("/?{}", query.unwrap_or_default())).build();
        let fields = uri.ok().and_then(|uri| Query::<BTreeMap<String, String>>::try_from_uri(&uri).ok());
        let Some(Query(mut fields)) = fields else {
            return Err(ApiError::new(ErrorCode::InvalidValue, "the query string is not valid"));
        };
        let stream = match fields.get("stream").map(String::as_str) {
            None | Some("false" | "False" | "0") => false,
            Some("true" | "True" | "1") => true,
            Some(other) => {
                let message = format!("stream is {other:?}; it must be true or false");
                return Err(ApiError::of(ErrorCode::InvalidValue, "stream", message));
            }
        };
        Ok(Wanted { stream, starting_after: fields.remove("starting_after") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_read() {
        let read = |query| Wanted::read(Some(query)).unwrap();
        assert_eq!(Wanted::read(None).unwrap(), Wanted::default());
        assert_eq!(read("include%5B%5D=a&stream=false"), Wanted::default());
        let wanted = read("stream=true&starting_after=ab%2F12.0");
        assert_eq!(wanted, Wanted { stream: true, starting_after: Some("ab/12.0".into()) });
        assert!(Wanted::read(Some("stream=maybe")).is_err());
    }
}
