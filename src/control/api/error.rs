//! Errors as clients see them: a status and `{"error": {"code", "message"}}`.

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::requests::NoAnswer;

/// Why a request was not carried out.
#[derive(Debug)]
pub struct ApiError {
    /// The status of HTTP.
    pub status: StatusCode,
    /// What programs go by.
    pub code: &'static str,
    /// What people read.
    pub message: String,
    /// Who has what was asked for.
    pub owner: Option<OwnerStatus>,
}

/// An error's body.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// It.
    pub error: ErrorText,
}

/// What an error's body says.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorText {
    /// What programs go by.
    pub code: String,
    /// What people read.
    pub message: String,
    /// With `port_taken`: who has the port, as far as it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<OwnerStatus>,
}

/// Who has a port of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OwnerStatus {
    /// The user's number.
    pub uid: u32,
    /// The process, where this one may know it.
    pub pid: Option<u32>,
    /// Its name.
    pub process: Option<String>,
}

impl ApiError {
    /// An error with `status` and `code`.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError { status, code, message: message.into(), owner: None }
    }

    /// A value of the request is wrong.
    pub fn bad_value(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "bad_value", message)
    }

    /// There is no such thing.
    pub fn not_found(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let error = ErrorText { code: self.code.to_owned(), message: self.message, owner: self.owner };
        (self.status, Json(ErrorBody { error })).into_response()
    }
}

impl From<NoAnswer> for ApiError {
    fn from(error: NoAnswer) -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no_answer", error.to_string())
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> ApiError {
        ApiError::new(rejection.status(), "bad_value", rejection.body_text())
    }
}

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> ApiError {
        ApiError::new(rejection.status(), "bad_value", rejection.body_text())
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> ApiError {
        ApiError::new(rejection.status(), "bad_value", rejection.body_text())
    }
}

/// Answers for paths that are none.
pub(super) async fn no_resource(uri: Uri) -> ApiError {
    ApiError::not_found(format!("no resource {}", uri.path()))
}

/// Answers for methods a path has not.
pub(super) async fn no_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{} has no method {method}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "no_method", message)
}
