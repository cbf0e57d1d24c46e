-- Sex and date of birth of the members, as far as they are known; one row a person, whatever the table holds.
SELECT
    CAST(p.person_id AS VARCHAR) AS patient,
    CASE min(p.gender_concept_id)
        WHEN 8507 THEN 'male' WHEN 8532 THEN 'female' WHEN 8521 THEN 'other' ELSE 'unknown'
    END AS sex,
    CAST(min(p.year_of_birth) AS VARCHAR) AS year,
    CAST(min(p.month_of_birth) AS VARCHAR) AS month,
    CAST(min(p.day_of_birth) AS VARCHAR) AS day
FROM person p
WHERE p.person_id IN (SELECT c.subject_id FROM cohort c WHERE c.cohort_definition_id = {cohort})
GROUP BY p.person_id
