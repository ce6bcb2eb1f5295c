//! The answer as it comes: a request's events become server-sent events. Whatever is at hand goes out as one
//! frame, hence one write.

mod chunks;

use crate::{
    models::Model,
    running::{News, Running, Step},
};
use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::{Bytes, BytesMut};
use forebay_schemas::openai::StreamOptions;
use std::convert::Infallible;

use chunks::Chunks;

/// Proxies such as nginx pass on what they read at once.
const NO_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// A response that tells a request's events. If the client stops reading it, it is dropped, and the request
/// cancelled.
pub(crate) fn response(running: Running, model: &Model, options: StreamOptions) -> Response {
    let usage = options.include_usage == Some(true);
    let chunks = Chunks::new(running.state(), &model.fingerprint, usage);
    let answer = Box::new(Answer { running, chunks, frame: BytesMut::new(), silent: false, ended: false });
    let frames = futures::stream::unfold(answer, |mut answer| async {
        answer.next_frame().await.map(|frame| (Ok::<_, Infallible>(frame), answer))
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (NO_BUFFERING, HeaderValue::from_static("no")),
    ];
    (headers, Body::from_stream(frames)).into_response()
}

/// An answer on its way.
struct Answer {
    running: Running,
    chunks: Chunks,
    /// Its memory is used again for the next frame once the last one is written.
    frame: BytesMut,
    /// Nothing was sent since the last tick of the keep-alive clock.
    silent: bool,
    ended: bool,
}

impl Answer {
    /// Everything that there is to send now, or waits for something; none after the end.
    async fn next_frame(&mut self) -> Option<Bytes> {
        while !self.ended {
            match self.running.next().await {
                Step::Events(events) => {
                    for recorded in &events {
                        self.tell(News::of(&recorded.event.body));
                    }
                }
                Step::Quiet if self.silent => self.chunks.comment(&mut self.frame),
                Step::Quiet => self.silent = true,
                Step::Stopped(error) => self.tell(Some(News::Ended(error))),
            }
            if !self.frame.is_empty() {
                self.silent = false;
                return Some(self.frame.split().freeze());
            }
        }
        None
    }

    fn tell(&mut self, news: Option<News<'_>>) {
        match news {
            None => {}
            Some(News::Text(text)) => self.chunks.text(&mut self.frame, text),
            Some(News::Completed(completed)) => {
                self.chunks.finish(&mut self.frame, completed);
                self.ended = true;
            }
            Some(News::Ended(error)) => {
                self.chunks.error(&mut self.frame, &error.envelope());
                self.ended = true;
            }
        }
    }
}
