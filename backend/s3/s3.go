//go:build !nos3

package s3

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/middleware"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/object"
)

// A Store is a [backend.Store] over a bucket. It keeps connections and the login between
// calls and is safe for concurrent use.
type Store struct {
	objects object.Store
	client  *object.Client
	s3      *s3.Client
	bucket  string
	found   *found // the login that was looked for; nil: it was given
}

// New returns a store. It makes no request and looks for no login.
func New(o Options) (*Store, error) {
	s, err := newStore(o)
	if err != nil {
		return nil, fmt.Errorf("prepare S3 client: %w", err)
	}
	return s, nil
}

func newStore(o Options) (*Store, error) {
	if err := object.CheckBucket(o.Bucket); err != nil {
		return nil, err
	}
	if !isRegion(o.Region) {
		return nil, fmt.Errorf("region %q: write one such as us-east-1", o.Region)
	}
	client, err := object.NewClient(o.HTTP)
	if err != nil {
		return nil, err
	}
	login, err := newLogin(o)
	if err != nil {
		return nil, err
	}
	s := &Store{client: client, bucket: o.Bucket}
	s.found, _ = login.(*found)
	so := s3.Options{
		Region: o.Region, HTTPClient: client, Credentials: login,
		Retryer: aws.NopRetryer{}, // backend.Retry does that
		// Checksums are of whole objects and we read ranges.
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenRequired,
		RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired,
	}
	so.EndpointOptions.DisableHTTPS = o.Scheme == "http"
	base, err := object.Base(o.Scheme, cmp.Or(o.Endpoint, "amazonaws.com"))
	if err != nil {
		return nil, err
	}
	if o.Endpoint != "" {
		so.BaseEndpoint, so.UsePathStyle = aws.String(base.String()), true
	}
	s.s3 = s3.New(so)
	s.objects = object.Store{Get: s.get, Prefix: o.Prefix, Stall: o.Stall}
	return s, nil
}

// isRegion reports whether s can be a part of a host's name.
func isRegion(s string) bool {
	for _, c := range s {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return s != "" && len(s) <= 63
}

// Open returns the blob of ref. With ref.Size it makes no request: a missing or
// forbidden blob or one of another size shows at the first read. Without, it asks
// for the first byte to learn the size.
func (s *Store) Open(ctx context.Context, ref backend.Ref) (backend.Blob, error) {
	return s.objects.Open(ctx, ref)
}

// Close closes idle connections. The store stays usable.
func (s *Store) Close() error { return s.client.Close() }

// get sends one request, and a second one when the first taught the client what the
// time is or that the login is to be renewed.
func (s *Store) get(ctx context.Context, key string, header http.Header) (*http.Response, error) {
	var login int
	if s.found != nil {
		login = s.found.version()
	}
	resp, err := s.getOnce(ctx, key, header)
	status, ok := errors.AsType[*backend.StatusError](err)
	switch {
	case !ok:
		return resp, err
	case status.Reason == "RequestTimeTooSkewed": // the client has noted the difference
	case s.found != nil && ended(status.Reason):
		s.found.drop(login)
	default:
		return nil, err
	}
	return s.getOnce(ctx, key, header)
}

// ended reports whether code says that a login was good once.
func ended(code string) bool {
	switch code {
	case "ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "InvalidAccessKeyId":
		return true
	}
	return false
}

func (s *Store) getOnce(ctx context.Context, key string, header http.Header) (*http.Response, error) {
	in := &s3.GetObjectInput{Bucket: &s.bucket, Key: &key, Range: aws.String(header.Get("Range"))}
	if tag := header.Get("If-Match"); tag != "" {
		in.IfMatch = &tag
	}
	out, err := s.s3.GetObject(ctx, in)
	if err != nil {
		return nil, translate(err)
	}
	raw, ok := middleware.GetRawResponse(out.ResultMetadata).(*smithyhttp.Response)
	if !ok {
		out.Body.Close()
		return nil, errors.New("s3: internal error: the client does not give its answer")
	}
	resp := *raw.Response
	resp.Body = out.Body
	return &resp, nil
}

// translate turns an error of the client into ours, without what the server said in
// words: it may echo what was signed.
func translate(err error) error {
	if unsent, ok := errors.AsType[*smithyhttp.RequestSendError](err); ok {
		return unsent.Err // what is around it speaks of a status of 0
	}
	refused, ok := errors.AsType[*awshttp.ResponseError](err)
	if !ok || refused.HTTPResponse() == nil || refused.HTTPStatusCode()/100 == 2 {
		return err
	}
	resp := refused.HTTPResponse().Response
	code := ""
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		code = api.ErrorCode()
	}
	status := object.Refusal(resp, code)
	switch region := resp.Header.Get("X-Amz-Bucket-Region"); {
	case status.Code/100 == 3 && isRegion(region):
		return fmt.Errorf("%w; the bucket is in region %s", status, region)
	case status.Code/100 == 3:
		return fmt.Errorf("%w; redirects are not followed: give the endpoint and region of the bucket itself", status)
	case ended(code) && status.Code == http.StatusBadRequest:
		return fmt.Errorf("%w: %w", status, fs.ErrPermission)
	}
	return status
}
