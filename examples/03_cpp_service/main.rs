//! Streams the continuation of a prompt from an artifact, in Rust: stream_from_rust OUT PROMPT
//!
//! The declarations are those of anybit.h that it uses; a structure that is only passed on, such as the
//! options, may stay a null pointer.
use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::io::Write;
use std::ptr::null;

#[repr(C)]
struct Finish {
    size: usize,
    reason: c_int,
    prompt_tokens: c_int,
    cached_tokens: c_int,
    completion_tokens: c_int,
    queued_s: f64,
    prefill_s: f64,
    decode_s: f64,
}

type OnToken = extern "C" fn(*mut c_void, i32, *const c_char, usize, f32);
type OnFinish = extern "C" fn(*mut c_void, *const Finish, *const c_char, *const c_char, usize);

#[repr(C)]
struct Request {
    size: usize,
    tokens: *const i32,
    token_count: usize,
    text: *const c_char,
    max_new_tokens: c_int,
    temperature: f32,
    top_p: f32,
    min_p: f32,
    top_k: c_int,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    bias_tokens: *const i32,
    biases: *const f32,
    bias_count: usize,
    seed: u64,
    logprobs: c_int,
    stop: *const *const c_char,
    stop_count: usize,
    stop_tokens: *const i32,
    stop_token_count: usize,
    ignore_end: c_int,
    on_token: Option<OnToken>,
    on_finish: Option<OnFinish>,
    user: *mut c_void,
}

#[link(name = "anybit")]
extern "C" {
    fn anybit_open(
        folder: *const c_char,
        options: *const c_void,
        error: *mut *mut c_char,
    ) -> *mut c_void;
    fn anybit_request_init(engine: *const c_void, request: *mut Request, size: usize);
    fn anybit_submit(
        engine: *mut c_void,
        request: *const Request,
        error: *mut *mut c_char,
    ) -> *mut c_void;
    fn anybit_wait(handle: *mut c_void, finish: *mut Finish, error: *mut *mut c_char) -> c_int;
    fn anybit_release(handle: *mut c_void);
    fn anybit_close(engine: *mut c_void);
    fn anybit_free(text: *mut c_char);
}

extern "C" fn show(
    _user: *mut c_void,
    _token: i32,
    text: *const c_char,
    length: usize,
    _logprob: f32,
) {
    let bytes = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), length) };
    let mut out = std::io::stdout();
    // a reader that went away is no reason to stop the engine
    let _ = out.write_all(bytes).and_then(|()| out.flush());
}

const ERROR: c_int = 3; // ANYBIT_ERROR

/// What was held back, such as the first letters of a stop string that did not come; and what went
/// wrong, if something did.
extern "C" fn show_rest(
    user: *mut c_void,
    finish: *const Finish,
    detail: *const c_char,
    text: *const c_char,
    length: usize,
) {
    unsafe {
        if (*finish).reason == ERROR {
            eprintln!("{}", CStr::from_ptr(detail).to_string_lossy());
        }
    }
    show(user, 0, text, length, 0.0);
}

unsafe fn refuse(error: *mut c_char) -> ! {
    eprintln!("{}", CStr::from_ptr(error).to_string_lossy());
    anybit_free(error);
    std::process::exit(2);
}

fn main() {
    let words: Vec<CString> = std::env::args()
        .skip(1)
        .filter_map(|word| CString::new(word).ok())
        .collect();
    let [folder, prompt] = words.as_slice() else {
        eprintln!("usage: stream_from_rust OUT PROMPT");
        std::process::exit(2);
    };
    unsafe {
        let mut error: *mut c_char = std::ptr::null_mut();
        let engine = anybit_open(folder.as_ptr(), null(), &mut error);
        if engine.is_null() {
            refuse(error);
        }
        let mut request: Request = std::mem::zeroed();
        anybit_request_init(engine, &mut request, std::mem::size_of::<Request>());
        request.text = prompt.as_ptr();
        request.max_new_tokens = 32;
        request.on_token = Some(show);
        request.on_finish = Some(show_rest);
        let handle = anybit_submit(engine, &request, &mut error);
        if handle.is_null() {
            anybit_close(engine);
            refuse(error);
        }
        let mut finish: Finish = std::mem::zeroed();
        finish.size = std::mem::size_of::<Finish>();
        anybit_wait(handle, &mut finish, std::ptr::null_mut());
        eprintln!("\n{} tokens", finish.completion_tokens);
        anybit_release(handle);
        anybit_close(engine);
        std::process::exit(c_int::from(finish.reason == ERROR));
    }
}
